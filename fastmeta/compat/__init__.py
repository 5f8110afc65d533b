"""Other libraries' names: code written for them runs after a change of its import."""
