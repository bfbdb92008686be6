"""What other libraries need of us, one module each, imported where it is used."""
