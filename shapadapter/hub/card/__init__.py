"""The model card; imported with the adapter, it tells the rooms below which functions write cards and upload."""

from shapadapter.adapter.saving import register_publisher

register_publisher(
    write_card="shapadapter.hub.card.document",
    prepare_upload="shapadapter.hub.card.renewal",
    copy_files="shapadapter.hub.upload",
    upload="shapadapter.hub.upload",
)
