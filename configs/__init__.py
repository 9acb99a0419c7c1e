"""Run configurations as package data: one YAML file is one run, and its first comment is the command that runs it.

From a checkout they are just `configs/*.yaml`. Installed, this prints where they lie:
`python -c "import configs; print(*configs.__path__)"`.
"""
