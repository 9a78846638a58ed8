"""The server over many hosts: its engine here, its workers on replicas of Ray Serve."""
