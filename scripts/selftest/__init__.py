"""The parts of scripts/selftest_device.py. Nothing here imports a framework before a child process has chosen one."""
