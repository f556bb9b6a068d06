{{/* What a schema cannot say of several values together. */}}
{{- define "check" -}}
{{- $from := 0 -}}
{{- range list .Values.repository.claim .Values.repository.image .Values.repository.init.image -}}
{{- if . }}{{ $from = add1 $from }}{{ end -}}
{{- end -}}
{{- if ne (int $from) 1 }}
{{- fail "repository: give one of claim, image and init.image; set the others to \"\"" }}
{{- end -}}
{{- if and .Values.repository.subPath (not .Values.repository.claim) }}
{{- fail "repository.subPath: is of repository.claim; leave it empty" }}
{{- end -}}
{{- if eq .Values.recipe "own" -}}
{{- if not (or .Values.server.image.tag .Values.server.image.digest) }}
{{- fail "server.image.tag: is empty and recipe is own; say which image serves the repository" }}
{{- end -}}
{{- if not .Values.server.slots }}
{{- fail "server.slots: is 0 and recipe is own; say how many streams the repository serves at once" }}
{{- end -}}
{{- end -}}
{{- if and (eq .Values.server.kind "kserve") (eq .Values.autoscaling.kind "hpa") }}
{{- fail "autoscaling.kind: hpa is of server.kind deployment; with kserve use keda or none" }}
{{- end -}}
{{- if gt (int .Values.autoscaling.min) (int .Values.autoscaling.max) }}
{{- fail "autoscaling.min: is over autoscaling.max" }}
{{- end -}}
{{- if .Values.tls.certManager.enabled -}}
{{- if not .Values.tls.certManager.issuer.name }}
{{- fail "tls.certManager.issuer.name: is empty; name the issuer of the front door's certificate" }}
{{- end -}}
{{- end -}}
{{- if .Values.gateway.enabled -}}
{{- if not .Values.gateway.config.destinations }}
{{- fail "gateway.config.destinations: is empty; say where readings go, as in gateway.yaml" }}
{{- end -}}
{{- if not .Values.gateway.dicom.peers }}
{{- fail "gateway.dicom.peers: is empty; name who may send: [{aet: PACS, addresses: [10.1.0.0/16]}]" }}
{{- end -}}
{{- if and .Values.gateway.postgresql.host (not .Values.gateway.postgresql.secretName) }}
{{- fail "gateway.postgresql.secretName: is empty; name the secret whose key `password` opens the database" }}
{{- end -}}
{{- if and (gt (int .Values.gateway.count) 1) (not .Values.gateway.postgresql.host) }}
{{- fail "gateway.count: is over 1 and the queue is SQLite; give gateway.postgresql.host" }}
{{- end -}}
{{- $many := or (has "ReadWriteMany" .Values.gateway.storage.accessModes) .Values.gateway.storage.claim -}}
{{- if and (gt (int .Values.gateway.count) 1) (not $many) }}
{{- fail "gateway.storage.accessModes: gateways share one storage; give [ReadWriteMany], or the claim of one" }}
{{- end -}}
{{- if and (eq .Values.gateway.through "door") (not .Values.frontDoor.enabled) }}
{{- fail "gateway.through: is door and frontDoor.enabled is false; give server" }}
{{- end -}}
{{- range $key := list "name" "storage" "queue" "dicom" -}}
{{- if hasKey $.Values.gateway.config $key }}
{{- fail (printf "gateway.config.%s: is set by the chart; remove it" $key) }}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end }}
