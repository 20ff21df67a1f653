"""The vocabulary of tersor: plain data and small functions; imports neither torch nor a runtime."""
