"""Measures whose published weights are torch files: LPIPS, FID, ImageReward. Where the weights are not, it is said.

`weights` finds and opens the files, `lpips`, `inception` and `image_reward` are the networks, `measure` asks all three.
"""
