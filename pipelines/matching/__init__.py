"""Matched crops: each source crop is shown target crops of a like layout (after Richter et al., "Enhancing Photorealism
Enhancement", 2021)."""
