"""From measured stage times to machines: a simulation of served readers, and what a number of studies takes."""
