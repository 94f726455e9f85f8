"""The evidence: one module a paper, named by its slug."""
