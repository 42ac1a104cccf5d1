"""Publishing on DataRobot with its own SDK: environments, models, deployments. Imported by `push` only.

Nothing is kept between two runs. What was pushed is recognised by its name and by a digest in its description, so a
run that was cut off goes on where it stopped, from any machine.
"""
