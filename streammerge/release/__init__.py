"""What goes out with a merge besides weights: model card, resolved recipe, SBOM, licence."""
