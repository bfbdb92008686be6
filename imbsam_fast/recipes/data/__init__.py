"""The data sets: how each is read, and the images and labels that come of it."""
