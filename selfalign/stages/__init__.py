"""The stages of the method: functions from files to files. Their records are in `selfalign.core.records`."""
