"""What a run says about its configuration, code and data when training begins. Nothing here changes the run."""
