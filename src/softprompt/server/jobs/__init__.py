"""Files and fine-tuning jobs: trained on the base that is being served, in the same process."""
