"""The hidden-state store: one dump is a folder of sealed Zarr v3 parts plus a manifest. FORMAT.md describes it on disk."""
