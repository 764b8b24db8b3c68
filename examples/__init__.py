"""Examples that use relattn; nothing in the package itself imports them."""
