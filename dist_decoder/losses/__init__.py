"""Loss terms: pure functions of gathered tensors."""
