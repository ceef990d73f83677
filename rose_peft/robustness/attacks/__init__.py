"""TextAttack's recipes on any classifier: over one fixed sample, resumable, without network where they need none."""
