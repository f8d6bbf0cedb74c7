"""Who asks: API keys, what each may see, and how much each may ask for."""
