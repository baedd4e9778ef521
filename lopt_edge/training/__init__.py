"""`finetune` and `resume`: a run in program order. Nothing is imported here, so that `comparison` never loads torch."""
