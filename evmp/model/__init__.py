"""Models: what a package of weights expects, and the adapters that run it.

`package` reads model.yaml and imports no torch, so any process may use it. The adapters do import
torch and are for predictor processes only.
"""
