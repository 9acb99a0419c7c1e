"""What people see at a terminal: commands made from functions, and progress bars."""
