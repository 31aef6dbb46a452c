"""What can be prepared: drawn street scenes, folders of images, Cityscapes, GTA5, side-by-side pairs."""
