"""Evidence: pictures from the same noise, their distance, their scores, and what may be said about them.

Nothing is imported here, so that `bittern.evaluation.scenes` comes without diffusers.
"""
