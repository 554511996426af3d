"""Drop-in replacements and plug-ins for other libraries. Importing this package imports none of them."""
