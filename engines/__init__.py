"""Models as files that a runtime loads: export, build, sessions, the sampling loop and the device bundle."""
