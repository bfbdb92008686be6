"""`imbsam-fast analyze`: the sharpness and the loss landscape of a trained network."""
