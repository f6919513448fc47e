"""What jobs publish and read: directories that appear all at once, their manifests and tables."""
