"""The writer of the embedded base's text: domains, manners, feelings, templates and the documents made of them."""
