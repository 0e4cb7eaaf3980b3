"""The TVM backend: scans as scheduled tensor programs."""
