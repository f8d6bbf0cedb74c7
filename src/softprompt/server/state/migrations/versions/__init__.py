"""One change each, in the order that their `down_revision` says. A released one is never edited."""
