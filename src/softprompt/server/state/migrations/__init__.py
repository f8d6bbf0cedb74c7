"""How the tables became what they are, one file per change in `versions`. Run by `softprompt.server.state.migrate`."""
