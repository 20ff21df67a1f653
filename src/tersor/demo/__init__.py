"""A small trained network that ships with the package, for `tersor demo` and for examples."""
