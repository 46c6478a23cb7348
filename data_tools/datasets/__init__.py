"""Readers, one file per dataset."""
