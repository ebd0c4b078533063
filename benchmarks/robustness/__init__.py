"""What happens when something goes wrong: jobs that break runs, inputs, files and networks on purpose, and count."""
