"""Measurements: picture quality (PD score), latency, and the reports made from them."""
