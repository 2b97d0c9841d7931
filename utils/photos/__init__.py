"""Photos to aligned faces: image files in folders, landmarks, detectors, the alignment itself."""
