"""Where bittern meets other libraries: one file for each concern."""
