"""Trains teachers, distils students, and shows every number."""
