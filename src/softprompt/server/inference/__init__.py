"""/v1/models, /v1/completions, /v1/chat/completions, /v1/classify and /v1/embeddings."""
