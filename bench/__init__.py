"""Measurements against other software and against the machine; nothing here is imported by greenloop."""
