"""`imbsam-fast report`: runs compared, in tables and on a page."""
