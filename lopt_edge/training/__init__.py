"""`finetune` and `resume`: a run in program order. No import here: `comparison` reads output_folder.py without torch."""
