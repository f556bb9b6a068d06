{{/* gateway.yaml of one gateway: what the chart sets, over what the values say. */}}
{{- define "gateway.config" -}}
{{- $gateway := .root.Values.gateway -}}
{{- $name := include "name" .root -}}
{{- $dicom := dict "aet" $gateway.dicom.aet "host" "0.0.0.0" "port" 11112 "peers" $gateway.dicom.peers "clear_text" $gateway.dicom.clearText -}}
{{- if $gateway.dicom.tlsSecret -}}
{{- $_ := set $dicom "tls" (dict "cert" "/etc/cxr-gateway/dicom/tls.crt" "key" "/etc/cxr-gateway/dicom/tls.key" "ca" "/etc/cxr-gateway/dicom/ca.crt") -}}
{{- end -}}
{{- $read := dict "url" (printf "%s-server:8001" $name) "clear_text" true -}}
{{- if eq $gateway.through "door" -}}
{{- $files := dict "ca" "/etc/cxr-gateway/client/ca.crt" -}}
{{- if ne .root.Values.frontDoor.auth "token" -}}
{{- $_ := set $files "cert" "/etc/cxr-gateway/client/tls.crt" -}}
{{- $_ := set $files "key" "/etc/cxr-gateway/client/tls.key" -}}
{{- end -}}
{{- $read = dict "url" (printf "%s-front:%v" $name .root.Values.frontDoor.service.port) "tls" $files -}}
{{- if ne .root.Values.frontDoor.auth "mtls" -}}
{{- $_ := set $read "token_file" "/etc/cxr-gateway/client/token" -}}
{{- end -}}
{{- end -}}
{{- $set := dict "name" (printf "%s-gateway-%d" $name .index) "storage" "/var/lib/cxr-gateway/storage" "dicom" $dicom "read" $read "web" (dict "host" "0.0.0.0" "port" 8042) -}}
{{- with $gateway.postgresql -}}
{{- if .host -}}
{{- $_ := set $set "queue" (printf "postgresql+psycopg://%s@%s:%v/%s" .user .host .port .database) -}}
{{- end -}}
{{- end -}}
{{- mergeOverwrite (deepCopy $gateway.config) $set | toYaml -}}
{{- end }}
