"""What is wrong with a dataset: near-duplicates, wrong labels, shortcuts, shifted splits, blank images.

  uv run jobs/audit.py data.root=<folder of class folders> model.name=tf_efficientnet_lite0 model.pretrained=true
  uv run jobs/audit.py data.root=<folder> model.name=tf_efficientnet_lite0 model.init_from=<file of its weights>

Writes a page with pictures (audit.html), audit.json, and a table (CSV) for each finding. Nothing is changed.
Without a model, labels and splits are judged by colours and textures, which see less.
"""

from potstill.config import AuditConfig, job


@job("audit")
def main(config: AuditConfig) -> None:
    from potstill.audit_report import audit_dataset

    audit_dataset(config)


if __name__ == "__main__":
    main()
