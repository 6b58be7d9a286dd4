"""Training one model in several processes: launchers, the process group, the watchdog."""
