"""`lopt-edge doctor`: is this machine sound, and how fast is it?"""
