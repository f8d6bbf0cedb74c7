"""What outlives the process: the database. Files, prompts and runs are files beside it."""
