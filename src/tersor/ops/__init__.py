"""Pure tensor mathematics shared by techniques."""
