"""The canary over releases: what each row leans on, read off the sources of host libraries without importing them."""
