"""What runs beside or under a program: its process, the server that forks it, and the judge. Standard library only.

These modules run as scripts in interpreters of their own (see `bootstrap`), without greenloop's package.
"""
