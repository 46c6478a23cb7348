"""Loss terms: pure functions of tensors. They never see a process group."""
